"""Weights in Parquet: schemas V1 (float) and V2 (quantized), reader, writer, conversion."""
