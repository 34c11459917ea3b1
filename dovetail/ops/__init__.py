"""Operations on tensors: the formula of each and its torch reference, and the Python side of the native
kernels. Imports core and host only."""
