/* Status codes and the error sentence every fallible function of the core fills. */
#ifndef GLM_STATUS_H
#define GLM_STATUS_H

enum glm_code {
    GLM_OK = 0,
    GLM_EVALUE,       /* an argument is wrong: ValueError */
    GLM_EMEMORY,      /* not enough memory: MemoryError */
    GLM_ENUMERIC,     /* NaN or infinity where a number is due: FloatingPointError */
    GLM_ESTATE,       /* called at the wrong time: RuntimeError */
    GLM_EINTERRUPTED, /* the caller's poll asked to stop: the pending Python exception */
    GLM_EFILE,        /* a file is not what it was when it was opened: OSError */
};
typedef enum glm_code glm_status;

struct glm_error {
    glm_status code;
    char text[512];
};

/* Fills err with a printf-formatted sentence and returns code. */
glm_status glm_fail(struct glm_error *err, glm_status code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#define GLM_TRY(call)                \
    do {                             \
        glm_status status_ = (call); \
        if (status_ != GLM_OK)       \
            return status_;          \
    } while (0)

#endif
