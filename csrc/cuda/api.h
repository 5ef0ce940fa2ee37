// The whole C interface of _cuda.so: what library.h says of it holds for all of its parts.
#pragma once

#include "blocks.h"
#include "bucket.h"
#include "collectives.h"
#include "library.h"
#include "optimizer.h"
#include "segment.h"
