// Captured: the arrays that a written score or mask reads, in front of all other arguments. A kernel that reads none
// has this one, which takes no room; jit/written.py writes that of a kernel which does.
#pragma once

namespace cuflash {

struct Captured {};

}  // namespace cuflash
