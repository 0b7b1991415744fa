#ifndef GLM_H
#define GLM_H
#include "backend.h"
#endif
