/* Rows of a table of tokens and, behind them, positions: (count) to (count, outputs). */
static inline void archnet_embed(
    const archnet_layer *layer, const int32_t *tokens, size_t count, size_t first, uint8_t *y)
{
    size_t output, place;
    for (place = 0; place < count; ++place) {
        for (output = 0; output < layer->outputs; ++output) {
            const size_t row = output * layer->row;
            const int32_t sum = archnet_weight(layer, row + (size_t)tokens[place])
                + archnet_weight(layer, row + ARCHNET_TOKENS + first + place);
            archnet_store(sum, layer, output, y, NULL, place * layer->outputs + output);
        }
    }
}

/* Every position beside its neighbours; zeros outside of the sentence. */
static inline void archnet_window(
    const uint8_t *x, uint8_t *y, size_t length, size_t channels, size_t before, size_t after)
{
    const size_t seen = before + 1 + after;
    size_t place, view;
    for (place = 0; place < length; ++place) {
        for (view = 0; view < seen; ++view) {
            uint8_t *to = y + (place * seen + view) * channels;
            if (place + view < before || place + view - before >= length) {
                memset(to, 0, channels);
            } else {
                memcpy(to, x + (place + view - before) * channels, channels);
            }
        }
    }
}

/* The last of a sentence's positions once more up to the last column: no maximum changes. */
static inline void archnet_repeat(uint8_t *x, size_t length, size_t columns, size_t channels)
{
    size_t place;
    for (place = length; place < columns; ++place) {
        memcpy(x + place * channels, x + (length - 1) * channels, channels);
    }
}

