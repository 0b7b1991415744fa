/* The reference in float: computes in double, stores float, so it is one rounding off the truth. */
#define REAL float
#define REAL_DTYPE GLM_F32
#define REF_NAME "ref_f32"
#define REF_CREATE glm_ref_f32_create
#include "ref_tmpl.h"
