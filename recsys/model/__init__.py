"""The recommender: item encoder, user encoder, ranker and losses."""
