"""Weight quantizers: each file is a method, a solver on a grid."""
