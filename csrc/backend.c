/* Backend by name. */
#include "backend.h"

#include <string.h>

glm_status glm_backend_create(struct glm_backend **out, const char *name, struct glm_error *err)
{
    *out = NULL;
    if (strcmp(name, "cpu") == 0)
        return glm_cpu_create(out, "", err);
    if (strncmp(name, "cpu:", 4) == 0)
        return glm_cpu_create(out, name + 4, err);
    if (strcmp(name, "plan") == 0)
        return glm_plan_create(out, err);
    if (strcmp(name, "ref_f32") == 0)
        return glm_ref_f32_create(out, err);
    if (strcmp(name, "ref_f64") == 0)
        return glm_ref_f64_create(out, err);
    return glm_fail(
        err, GLM_EVALUE,
        "backend '%s': expected cpu, cpu:generic, cpu:avx2, cpu:avx512, plan, ref_f32 or ref_f64",
        name);
}
