"""Files beside a store and the Parquet files that go out of it and come into it."""
