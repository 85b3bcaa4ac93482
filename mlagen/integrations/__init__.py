"""mlagen's kernels under the names and signatures of other libraries."""
