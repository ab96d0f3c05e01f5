"""Weights in Parquet: schemas V1 (float) and V2 (quantized), reader, writer, conversion."""

from memopt.extras import require

require("pyarrow", extra="arrow", why="read and write weights")
require("ml_dtypes", extra="arrow", why="read and write weights")
