#include "status.h"

#include <stdarg.h>
#include <stdio.h>

glm_status glm_fail(struct glm_error *err, glm_status code, const char *format, ...)
{
    va_list args;
    err->code = code;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    return code;
}
