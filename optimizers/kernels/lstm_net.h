/* The LSTM's weights as its kernel reads them. Include vectors.h before. */
typedef struct {
    int num_inputs, num_k, padded_k, rows; /* K; K + 1 (bias) up to a multiple of 4; 4H up to a multiple of LANES */
    REAL *gates;                           /* [H][K][4]: the four gates of a unit side by side, times unit */
    REAL *bias;                            /* [H][4], times unit */
    REAL *across;                          /* [padded_k / 4][4H][4]: the transposed weight */
    REAL *grad;                            /* [padded_k][rows]: the weight's gradient, transposed; row K the bias's */
} Layer;

typedef struct {
    int num_inputs, hidden, num_layers;
    Layer *layers;
    const REAL *readout, *readout_bias;
} Net;

static void release(Net *net) {
    if (net->layers)
        for (int l = 0; l < net->num_layers; l++) {
            free(net->layers[l].gates);
            free(net->layers[l].bias);
            free(net->layers[l].across);
            free(net->layers[l].grad);
        }
    free(net->layers);
}

/* Fill `net` from theta, its gates times unit[4]; with what the adjoint needs where `backward`. Returns 0 where memory is
 * short; release it in either case. */
static int pack(Net *net, int num_inputs, int hidden, int num_layers, const REAL *const *theta, const REAL *unit,
                int backward) {
    *net = (Net){num_inputs, hidden, num_layers, calloc(num_layers, sizeof(Layer)), theta[2 * num_layers],
                 theta[2 * num_layers + 1]};
    if (!net->layers) return 0;
    for (int l = 0; l < num_layers; l++) {
        Layer *layer = net->layers + l;
        const REAL *weight = theta[2 * l], *bias = theta[2 * l + 1];
        layer->num_inputs = l ? hidden : num_inputs;
        layer->num_k = layer->num_inputs + hidden;
        layer->padded_k = ROUND_UP(layer->num_k + 1, 4);
        layer->rows = ROUND_UP(4 * hidden, LANES);
        layer->gates = aligned((size_t)hidden * layer->num_k * 4);
        layer->bias = aligned((size_t)hidden * 4);
        if (!layer->gates || !layer->bias) return 0;
        for (int j = 0; j < hidden; j++)
            for (int g = 0; g < 4; g++) {
                const REAL *row = weight + (size_t)(g * hidden + j) * layer->num_k;
                for (int k = 0; k < layer->num_k; k++)
                    layer->gates[((size_t)j * layer->num_k + k) * 4 + g] = unit[g] * row[k];
                layer->bias[j * 4 + g] = unit[g] * bias[g * hidden + j];
            }
        if (!backward) continue;
        layer->across = aligned((size_t)layer->padded_k * 4 * hidden);
        layer->grad = aligned((size_t)layer->padded_k * layer->rows);
        if (!layer->across || !layer->grad) return 0;
        for (int r = 0; r < 4 * hidden; r++)
            for (int k = 0; k < layer->num_k; k++)
                layer->across[((size_t)(k / 4) * 4 * hidden + r) * 4 + k % 4] = weight[(size_t)r * layer->num_k + k];
    }
    return 1;
}
