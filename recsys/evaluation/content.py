"""What the catalogue says of items as sparse vectors, by which lists are told to be diverse; no model has a part in them."""

import numpy as np
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.preprocessing import normalize

from recsys.data.item_features import ItemFeatures


def content_vectors(catalogue: ItemFeatures) -> csr_array | None:
    """Describe each item by its categories, or else by its given vector, or else by the words of its text.

    The model's own vectors would let it be its own judge, and no two models could be compared. None where the catalogue has nothing.

    Returns:
        (I + 1, C) of rows of length 1, or 0 where nothing is known of an item.
    """
    if catalogue.categories.any():
        return _normalised(_one_hot(catalogue.categories.numpy(), catalogue.num_categories))
    if catalogue.vectors.any():
        return _normalised(csr_array(catalogue.vectors.numpy(), dtype=np.float64))
    if catalogue.has_text.any():
        return _normalised(HashingVectorizer(alternate_sign=False).transform(catalogue.texts))
    return None


def _one_hot(categories: "np.ndarray[tuple[int, int], np.dtype[np.int32]]", num_categories: int) -> csr_array:
    rows, columns = np.nonzero(categories)
    entries = (np.ones(len(rows)), (rows, categories[rows, columns]))
    return csr_array(entries, shape=(len(categories), num_categories + 1))


def _normalised(vectors: csr_array) -> csr_array:
    return csr_array(normalize(vectors))
