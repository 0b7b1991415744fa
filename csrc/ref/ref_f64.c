/* The reference in double: the oracle of gradient checks. */
#define REAL double
#define REAL_DTYPE GLM_F64
#define REF_NAME "ref_f64"
#define REF_CREATE glm_ref_f64_create
#include "ref_tmpl.h"
