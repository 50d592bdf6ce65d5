#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Bytes hold two's complement where their grid is signed, so one set of kernels reads both. */
static inline int32_t archnet_value(uint8_t byte, int is_signed)
{
    return is_signed ? (int32_t)(byte ^ 0x80) - 0x80 : (int32_t)byte;
}

/* Accumulators to integers: clip(round((acc * multiplier + offset) / 2^shift), low, high).
 * A channel has its own constants where each is 1, and all share the first where it is 0. */
typedef struct {
    const int32_t *multiplier;
    const uint8_t *shift;
    const int64_t *offset;
    size_t each;
    int32_t low, high;
} archnet_scale;

/* weights are rows of (inputs) or (channels, kernel, kernel), one for each output. */
typedef struct {
    const void *weights;
    int bits;
    const int32_t *bias;
    size_t outputs, row;
    const archnet_scale *scale; /* NULL: the accumulators are the result */
} archnet_layer;

/* Rounds half to even. C leaves the right shift of negative numbers to the compiler. */
static inline uint8_t archnet_rescale(int32_t accumulator, const archnet_scale *scale, size_t channel)
{
    const size_t at = channel * scale->each;
    const int shift = scale->shift[at];
    int64_t value = (int64_t)accumulator * scale->multiplier[at];
    int64_t level, rest, half;
    if (scale->offset) {
        value += scale->offset[at];
    }
    level = value >= 0 ? value >> shift : ~(~value >> shift);
    rest = value - level * ((int64_t)1 << shift);
    half = ((int64_t)1 << shift) / 2;
    if (shift > 0 && (rest > half || (rest == half && (level & 1)))) {
        level += 1;
    }
    level = level < scale->low ? scale->low : level;
    level = level > scale->high ? scale->high : level;
    return (uint8_t)level;
}

/* A weight from a stream of bits, least significant first; a spare byte ends it. */
static inline int8_t archnet_weight(const archnet_layer *layer, size_t at)
{
    const uint8_t *stream = (const uint8_t *)layer->weights;
    const int bits = layer->bits;
    if (bits == 8) {
        return ((const int8_t *)layer->weights)[at];
    } else {
        const size_t bit = at * (size_t)bits;
        const unsigned pair = stream[bit / 8] | ((unsigned)stream[bit / 8 + 1] << 8);
        const int field = (int)((pair >> (bit % 8)) & ((1U << bits) - 1U));
        const int sign = 1 << (bits - 1);
        return (int8_t)(bits == 1 ? 2 * field - 1 : (field ^ sign) - sign);
    }
}

static inline void archnet_unpack(const archnet_layer *layer, size_t output, int8_t *row)
{
    size_t i;
    for (i = 0; i < layer->row; ++i) {
        row[i] = archnet_weight(layer, output * layer->row + i);
    }
}

static inline void archnet_store(
    int32_t accumulator, const archnet_layer *layer, size_t channel,
    uint8_t *y, int32_t *raw, size_t at)
{
    if (raw) {
        raw[at] = accumulator;
    } else {
        y[at] = archnet_rescale(accumulator, layer->scale, channel);
    }
}

/* (channels, height, width) to (outputs, rows, columns). */
static inline void archnet_conv(
    const archnet_layer *layer, const uint8_t *x, int is_signed, uint8_t *y, int32_t *raw,
    int channels, int height, int width, int rows, int columns, int kernel, int stride, int padding)
{
    static int8_t weights[ARCHNET_LONGEST_ROW];
    size_t output;
    int row, column, channel, i, j;
    for (output = 0; output < layer->outputs; ++output) {
        archnet_unpack(layer, output, weights);
        for (row = 0; row < rows; ++row) {
            for (column = 0; column < columns; ++column) {
                int32_t sum = layer->bias[output];
                for (i = 0; i < kernel; ++i) {
                    const int top = row * stride + i - padding;
                    for (j = 0; j < kernel; ++j) {
                        const int left = column * stride + j - padding;
                        if (top < 0 || top >= height || left < 0 || left >= width) {
                            continue;
                        }
                        for (channel = 0; channel < channels; ++channel) {
                            const size_t at = ((size_t)channel * height + top) * width + left;
                            sum += archnet_value(x[at], is_signed)
                                * weights[(channel * kernel + i) * kernel + j];
                        }
                    }
                }
                archnet_store(sum, layer, output, y, raw, (output * rows + row) * columns + column);
            }
        }
    }
}

/* (positions, inputs) to (positions, outputs). */
static inline void archnet_fully_connected(
    const archnet_layer *layer, const uint8_t *x, int is_signed, uint8_t *y, int32_t *raw,
    size_t positions)
{
    static int8_t weights[ARCHNET_LONGEST_ROW];
    size_t output, position, i;
    for (output = 0; output < layer->outputs; ++output) {
        archnet_unpack(layer, output, weights);
        for (position = 0; position < positions; ++position) {
            int32_t sum = layer->bias[output];
            for (i = 0; i < layer->row; ++i) {
                sum += archnet_value(x[position * layer->row + i], is_signed) * weights[i];
            }
            archnet_store(sum, layer, output, y, raw, position * layer->outputs + output);
        }
    }
}

/* (channels, height, width) to (channels, rows, columns); what is outside has the lowest value. */
static inline void archnet_max_pool2x2(
    const uint8_t *x, int is_signed, uint8_t *y, int channels, int height, int width,
    int rows, int columns, int stride, int before_left, int before_top, int32_t lowest)
{
    int channel, row, column, i, j;
    for (channel = 0; channel < channels; ++channel) {
        for (row = 0; row < rows; ++row) {
            for (column = 0; column < columns; ++column) {
                int32_t highest = lowest;
                for (i = 0; i < 2; ++i) {
                    const int top = row * stride + i - before_top;
                    for (j = 0; j < 2; ++j) {
                        const int left = column * stride + j - before_left;
                        if (top >= 0 && top < height && left >= 0 && left < width) {
                            const size_t at = ((size_t)channel * height + top) * width + left;
                            const int32_t value = archnet_value(x[at], is_signed);
                            highest = value > highest ? value : highest;
                        }
                    }
                }
                y[((size_t)channel * rows + row) * columns + column] = (uint8_t)highest;
            }
        }
    }
}

/* Batch normalization, or a change of grid: (channels, inner), each value for itself. */
static inline void archnet_affine(
    const archnet_scale *scale, const uint8_t *x, int is_signed, uint8_t *y,
    size_t channels, size_t inner)
{
    size_t i;
    for (i = 0; i < channels * inner; ++i) {
        y[i] = archnet_rescale(archnet_value(x[i], is_signed), scale, i / inner);
    }
}

/* Every layout move: elements of size bytes, in order of shape, between two sets of strides. */
static inline void archnet_copy(
    size_t size, void *y, size_t y_first, const void *x, size_t x_first,
    const size_t *shape, const size_t *y_strides, const size_t *x_strides)
{
    size_t count = 1, i, axis;
    for (axis = 0; axis < ARCHNET_RANK; ++axis) {
        count *= shape[axis];
    }
    for (i = 0; i < count; ++i) {
        size_t rest = i, from = x_first, to = y_first;
        for (axis = ARCHNET_RANK; axis-- > 0;) {
            from += rest % shape[axis] * x_strides[axis];
            to += rest % shape[axis] * y_strides[axis];
            rest /= shape[axis];
        }
        memcpy((uint8_t *)y + to * size, (const uint8_t *)x + from * size, size);
    }
}

static inline void archnet_widen(const uint8_t *x, int is_signed, int32_t *y, size_t count)
{
    size_t i;
    for (i = 0; i < count; ++i) {
        y[i] = archnet_value(x[i], is_signed);
    }
}
