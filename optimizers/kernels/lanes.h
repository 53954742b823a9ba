/* Where the lanes of tensors lie; a lane is one particle or task. Include vectors.h before.
 *
 * `data` has the tensors' addresses, and `strides` how far apart the lanes lie in each, num_dims numbers a tensor, in
 * elements, 0 where all lanes share it; the lanes are numbered with the last of their dimensions fastest.
 */
typedef struct {
    int num_dims;
    const long *sizes;
    REAL *const *data;
    const long *strides;
} Lanes;

/* Where a lane's part of data[which] lies; NULL where there is no such tensor. */
static REAL *of_lane(const Lanes *lanes, long lane, int which) {
    REAL *at = lanes->data[which];
    if (!at) return NULL;
    for (int d = lanes->num_dims - 1; d >= 0; lane /= lanes->sizes[d--])
        at += lane % lanes->sizes[d] * lanes->strides[which * lanes->num_dims + d];
    return at;
}
