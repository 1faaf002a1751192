#include "async_proxy.hpp"

namespace cuflash::host {

AsyncProxy async_proxy;
static const Register kAsyncProxy{{[] { async_proxy.start(); }, nullptr, nullptr}};

void AsyncProxy::start() {
  unfenced.assign(block.smem_bytes / 16, 0);
  written.assign(block.threads.size(), {});
}

void AsyncProxy::note_write(int thread, uint32 address) {
  written[thread].push_back(address / 16);
  ++unfenced[address / 16];
}

void AsyncProxy::fence(int thread) {
  for (const uint32 unit : written[thread]) --unfenced[unit];
  written[thread].clear();
}

void AsyncProxy::check(const char* who, uint32 address) const {
  if (unfenced[address / 16]) fail("%s meets bytes at %u that lack their writer's fence_proxy_async", who, address);
}

char* async_unit(const char* who, uint32 address) {
  if (int64(address) + 16 > block.smem_bytes) fail("%s beyond shared memory, at %u", who, address);
  async_proxy.check(who, swizzled(address));
  return block.smem + swizzled(address);
}

}  // namespace cuflash::host
