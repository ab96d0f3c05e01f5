"""What a memory is: records, rows, content, vectors and words; nothing here opens a database."""
