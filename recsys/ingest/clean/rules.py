"""Every cleaning rule, with its sentence for the report."""

from recsys.schema import MAX_ID_CHARACTERS

REJECTED = {
    "null_user": "the user id is missing or blank",
    "null_item": "the item id is missing or blank",
    "null_time": "the time or position is missing",
    "bad_time": "the time or position cannot be read, or is beyond all reason",
    "long_id": f"the user id, item id or event kind has more than {MAX_ID_CHARACTERS} characters",
    "null_event": "the event kind is missing or blank in a table that has kinds",
    "bad_value": "the value is there and not a finite number",
    "outlier_value": "the value is outside data.cleaning.min_value and max_value",
    "early_time": "the time is before data.cleaning.min_time",
    "future_time": "the time is after data.cleaning.max_time",
    "negative_id": "the user or item id is a negative number, and data.cleaning.reject_negative_ids is true",
    "known": "an appended event that the dataset has already: the same user, item, time and kind",
    "duplicate": "an earlier row has the same user, item, time and kind",
    "bot": "the user has more than data.cleaning.max_events_per_minute events in a minute of the clock; all of them go",
    "k_core_item": "the item has fewer than data.k_core interactions",
    "k_core_user": "the user has fewer than data.k_core interactions",
    "withheld": "a training interaction with an item that data.withheld_items keeps out of training",
    "catalogue_long_id": f"a catalogue row whose id has more than {MAX_ID_CHARACTERS} characters",
    "catalogue_null_id": "a catalogue row without an item id",
    "catalogue_negative_id": "a catalogue row whose id is a negative number, and data.cleaning.reject_negative_ids is true",
    "catalogue_duplicate": "a catalogue row whose item has an earlier one",
    "user_null_id": "a row of the users table without a user id",
    "user_long_id": f"a row of the users table whose id has more than {MAX_ID_CHARACTERS} characters",
    "user_duplicate": "a row of the users table whose user has an earlier one",
}
"""What is dropped, in the order in which the rules apply; a row is counted under the first that it breaks. Rules about time
hold where the order is a time, not where it is a position."""

NOTICED = {
    "negative_id": "events whose user or item id is a negative number, as hashes to signed numbers are; they are ids like any other",
    "odd_id": "events whose user or item id holds control characters, or broken text, which is written as \\xNN",
    "rounded_id": "events whose user or item id may have lost digits before: a float too large to be exact, or a spreadsheet's 4.0E+12",
    "out_of_order": "events that stand right after a later one of the same user in the input; they are sorted",
    "equal_time": "events at the same time as the one before them of the same user; the input's order decides",
    "late": "appended events that are older than what was known of their user; they are put in their place",
    "withheld_item": "items that data.withheld_items keeps out of training, so that validation and test have cold ones",
    "query_cut": "events whose query is cut at 2000 characters",
    "unknown_item": "items that events name and the catalogue does not list; they have no text and no features",
    "text_cut": "items whose text is cut at 2000 characters",
    "text_unprintable": "items whose text loses control characters or broken text, such as lone surrogates",
    "category_changed": "category entries that lose control characters or broken text, or are cut at 2000 characters",
}
"""What is kept and counted."""

REMEDIES = {
    "null_user": "data.columns.user_id names the column of user ids",
    "null_item": "data.columns.item_id names the column of item ids",
    "null_time": "data.columns.timestamp or data.columns.position names the column that orders events",
    "bad_time": "write times as 2024-01-31T12:00:00Z or as numbers, or name another column by data.columns.timestamp",
    "null_event": "data.columns.event names the column of event kinds; data.columns.event='' reads none",
    "bad_value": "data.columns.value names the column of values; data.columns.value='' reads none",
    "outlier_value": "data.cleaning.min_value and data.cleaning.max_value say which values are taken",
    "early_time": "data.time_unit says what times are counted in, data.cleaning.min_time from when on they are taken",
    "future_time": "data.time_unit says what times are counted in, data.cleaning.max_time until when they are taken",
    "negative_id": "data.cleaning.reject_negative_ids=false takes them",
    "bot": "a higher data.cleaning.max_events_per_minute takes them",
    "k_core_item": "a lower data.k_core takes them",
    "k_core_user": "a lower data.k_core takes them",
    "withheld": "a lower data.withheld_items leaves more items to train on",
}
"""Which setting takes the rows that a rule drops, for where it has dropped them all."""
