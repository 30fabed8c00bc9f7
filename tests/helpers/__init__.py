"""What tests make: models, runs, texts, processes; each file is named by what it makes."""
