"""What is near a vector, has the words of a question, or stands beside what has."""
