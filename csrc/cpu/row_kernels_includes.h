// What row_kernels.inl needs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "row_kernels.h"
