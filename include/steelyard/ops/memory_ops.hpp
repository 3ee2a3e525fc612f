// What a device does with memory as such, and in which order it works.
#pragma once

#include "steelyard/core/view.hpp"

namespace steelyard {

/// Memory kernels of a device, as static functions, for tensors of numbers whose rows are contiguous; rows may be
/// padded.
///
///  static constexpr bool asynchronous
///      false: the host reaches the device's memory, and what is called is done when the call returns. True: memory is
///      the device's own, and calls are worked through in order, in the device's own time. *Pinned* memory is then the
///      host's, but the device reaches it too.
///  void fill(device, tensor (=), value)
///  void copy(device, from, to (=))
///      Of the same extents, between any two memories that the device reaches.
///  void upload(device, from (the host's; pinned), to (=) of the device)
///
/// And where work is asynchronous:
///
///  Device beside(device)
///      A line of work beside the device's own.
///  Device fork(device)
///      The same line, which goes on when everything called so far on the device is done.
///  void join(device)
///      What is called on the device from now on waits for its fork.
///  void run_on_host(device, void (*function)(void*), void* argument)
///      Calls function(argument), which must not call the device, when everything called so far is done.
///  void wait(device)
///      Returns when everything called so far is done.
template <class Device>
struct memory_ops;

}  // namespace steelyard
