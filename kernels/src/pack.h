// Quantises float weights into the packed layouts of formats.h, row by row, so that no matrix is in memory twice.
#pragma once

#include "formats.h"

namespace autoglm {

// Writes rows [first, first + count) of `shape` (its data and scales are ignored) from src [count][shape.k] into the
// whole matrix at data and scales. `importance` [k] weighs squared errors of int4 (null: all alike). Rows of padding
// must be written too, as zeros. Not finite: false, nothing else fails.
bool pack_rows(const Matrix& shape, const float* src, int first, int count, const float* importance, uint8_t* data, uint16_t* scales);

// Row `row` of a packed matrix as floats, out [k].
void dequantise_row(const Matrix& w, int row, float* out);

}  // namespace autoglm
