/* libacl_op_compiler.so without a compiler: options are taken, compiling an operator is refused. */
#include <stddef.h>
#include <stdint.h>

enum { OK = 0, NO_COMPUTE = 100000 };

int aclSetCompileopt(int option, const char *value) { return OK; }
size_t aclGetCompileoptSize(int option) { return 256; }
int aclGetCompileopt(int option, char *value, size_t size) {
  if (size) value[0] = 0;
  return OK;
}
int aclopSetCompileFlag(int flag) { return OK; }
int aclGenGraphAndDumpForOp(void) { return OK; }
int aclopCompileAndExecuteV2(void) { return NO_COMPUTE; }
int aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return OK; }
int aclrtSetSysParamOpt(int option, int64_t value) { return OK; }
int aclrtCtxSetSysParamOpt(int option, int64_t value) { return OK; }
