/* libascendcl.so without a device: what torch_npu needs to be imported, to hold memory and to be asked about itself.
 *
 * A device's memory is this host's memory, so that a tensor on `npu` can be looked at from here. Streams and events
 * exist and are always done. Whatever would run an operator returns NO_COMPUTE and so becomes an error in torch_npu:
 * an operator that seemed to succeed without having computed anything would be worse than none.
 *
 * The signatures are those of the calls' first arguments only, as far as an answer needs them; callers pass more.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, NO_MEMORY = 507899, NO_COMPUTE = 100000, ALIGNMENT = 512, PADDING = 32 };
#define GIB ((size_t)1 << 30)

static int32_t current_device = 0;

/* --- what there is: one 910B, and a CANN new enough for every feature that torch_npu asks about --- */

int aclInit(const char *config) { return OK; }
int aclFinalize(void) { return OK; }
int aclrtGetDeviceCount(uint32_t *count) { *count = 1; return OK; }
int aclrtGetDevice(int32_t *device) { *device = current_device; return OK; }
int aclrtSetDevice(int32_t device) { current_device = device; return OK; }
int aclrtResetDevice(int32_t device) { return OK; }
const char *aclrtGetSocName(void) { return "Ascend910B1"; }
const char *aclGetRecentErrMsg(void) { return ""; }
void aclAppLog(int level, const char *function, const char *file, uint32_t line, const char *format, ...) {}
int aclrtGetDeviceInfo(uint32_t device, int attribute, int64_t *value) { *value = 24; return OK; }
int aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
  if (flags) *flags = 0;
  *active = 1;
  return OK;
}
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) { *can = 0; return OK; }
int aclsysGetVersionStr(const char *package, char *version) { strcpy(version, "8.5.0"); return OK; }
int aclsysGetCANNVersion(int name, void *version) {
  memset(version, 0, 64);
  strcpy(version, "8.5.0");
  return OK;
}
int aclGetCannAttribute(int attribute, int32_t *value) { *value = 0; return OK; }
int aclrtSetDeviceSatMode(int mode) { return OK; }
int aclrtCtxSetSysParamOpt(int option, int64_t value) { return OK; }
int aclrtSetSysParamOpt(int option, int64_t value) { return OK; }
int aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return OK; }
int aclrtPeekAtLastError(int level) { return OK; }
int aclrtGetLastError(int level) { return OK; }

/* --- memory --- */

static int take(void **pointer, size_t size) {
  return posix_memalign(pointer, ALIGNMENT, size + PADDING) ? NO_MEMORY : OK;
}
int aclrtMalloc(void **pointer, size_t size, int policy) { return take(pointer, size); }
int aclrtMallocAlign32(void **pointer, size_t size, int policy) { return take(pointer, size); }
int aclrtMallocHost(void **pointer, size_t size) { return take(pointer, size); }
int aclrtFree(void *pointer) { free(pointer); return OK; }
int aclrtFreeHost(void *pointer) { free(pointer); return OK; }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) { memcpy(to, from, size); return OK; }
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
  memcpy(to, from, size);
  return OK;
}
int aclrtMemset(void *at, size_t room, int value, size_t size) { memset(at, value, size); return OK; }
int aclrtMemsetAsync(void *at, size_t room, int value, size_t size, void *stream) {
  memset(at, value, size);
  return OK;
}
int aclrtGetMemInfo(int kind, size_t *available, size_t *total) {
  *available = 60 * GIB;
  *total = 64 * GIB;
  return OK;
}
int aclrtPointerGetAttributes(const void *pointer, void *attributes) { memset(attributes, 0, 16); return OK; }

/* --- streams and events: handles that mean nothing, work that is always done --- */

static int handle(void **out) { *out = malloc(8); return *out ? OK : NO_MEMORY; }
int aclrtCreateStream(void **stream) { return handle(stream); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { return handle(stream); }
int aclrtCreateEventExWithFlag(void **event, uint32_t flags) { return handle(event); }
int aclrtCreateEventWithFlag(void **event, uint32_t flags) { return handle(event); }
int aclrtDestroyStream(void *stream) { return OK; }
int aclrtDestroyStreamForce(void *stream) { return OK; }
int aclrtDestroyEvent(void *event) { return OK; }
int aclrtGetCurrentContext(void **context) { static int only; *context = &only; return OK; }
int aclrtSetCurrentContext(void *context) { return OK; }
int aclrtEventElapsedTime(float *milliseconds, void *from, void *to) { *milliseconds = 0.5f; return OK; }
int aclrtSynchronizeDevice(void) { return OK; }
int aclrtSynchronizeDeviceWithTimeout(int timeout) { return OK; }
int aclrtSynchronizeStreamWithTimeout(void *stream, int timeout) { return OK; }
int aclrtQueryEventStatus(void *event, int *status) { *status = 1; return OK; }
int aclQueryEventRecordedStatus(void *event, int *status) { *status = 1; return OK; }
int aclrtQueryEventWaitStatus(void *event, int *status) { *status = 1; return OK; }
int aclrtStreamQuery(void *stream, int *status) { *status = 1; return OK; }
int aclrtStreamGetId(void *stream, int32_t *id) { *id = 1; return OK; }
int aclrtSetOpWaitTimeout(uint32_t seconds) { return OK; }
int aclrtSetOpExecuteTimeOut(uint32_t seconds) { return OK; }
int aclrtSetStreamFailureMode(void *stream, uint64_t mode) { return OK; }
int aclrtSetStreamAttribute(void *stream, int attribute, void *value) { return OK; }
int aclrtSetStreamOverflowSwitch(void *stream, uint32_t flag) { return OK; }

/* --- what would compute --- */

#define REFUSED(name) long name(void) { return NO_COMPUTE; }
REFUSED(aclopCompileAndExecute)
REFUSED(aclrtBinaryGetFunction)
REFUSED(aclrtBinaryLoadFromData)
REFUSED(rtDevBinaryRegister)
REFUSED(rtFunctionRegister)
REFUSED(rtKernelLaunch)

/* --- what is only noted: descriptions of operators that are refused later, profiling, sharing between processes --- */

#define NOTED(name) long name(void) { return OK; }
NOTED(MsprofGetHashId)
NOTED(MsprofRegisterCallback)
NOTED(MsprofReportAdditionalInfo)
NOTED(MsprofReportApi)
NOTED(MsprofReportCompactInfo)
NOTED(MsprofSysCycleTime)
NOTED(aclCreateDataBuffer)
NOTED(aclCreateTensorDesc)
NOTED(aclDestroyDataBuffer)
NOTED(aclDestroyTensorDesc)
NOTED(aclGetDeviceCapability)
NOTED(aclGetTensorDescDimV2)
NOTED(aclGetTensorDescFormat)
NOTED(aclGetTensorDescNumDims)
NOTED(aclGetTensorDescType)
NOTED(aclSetTensorDescName)
NOTED(aclSetTensorFormat)
NOTED(aclSetTensorPlaceMent)
NOTED(aclSetTensorShape)
NOTED(aclmdlFinalizeDump)
NOTED(aclmdlInitDump)
NOTED(aclmdlSetDump)
NOTED(aclopCreateAttr)
NOTED(aclopDestroyAttr)
NOTED(aclopSetAttrBool)
NOTED(aclopSetAttrDataType)
NOTED(aclopSetAttrFloat)
NOTED(aclopSetAttrInt)
NOTED(aclopSetAttrListBool)
NOTED(aclopSetAttrListFloat)
NOTED(aclopSetAttrListInt)
NOTED(aclopSetAttrListListInt)
NOTED(aclopSetAttrString)
NOTED(aclrtDeviceEnablePeerAccess)
NOTED(aclrtDeviceGetBareTgid)
NOTED(aclrtFreePhysical)
NOTED(aclrtGetFunctionAddr)
NOTED(aclrtMallocPhysical)
NOTED(aclrtMapMem)
NOTED(aclrtMemExportToShareableHandle)
NOTED(aclrtMemImportFromShareableHandle)
NOTED(aclrtMemSetPidToShareableHandle)
NOTED(aclrtProcessReport)
NOTED(aclrtRecordEvent)
NOTED(aclrtReleaseMemAddress)
NOTED(aclrtReserveMemAddress)
NOTED(aclrtResetEvent)
NOTED(aclrtStreamWaitEvent)
NOTED(aclrtSynchronizeEvent)
NOTED(aclrtSynchronizeStream)
NOTED(aclrtUnmapMem)
NOTED(rtGetC2cCtrlAddr)
