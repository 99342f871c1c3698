"""The synthetic catalogue: items with tastes, series, popularity and text."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys.arrays import Floats, Integers
from recsys.config.data import SyntheticConfig

_NUM_GROUPS = 3
_YEAR_MOMENTS = 365
_SECOND_TASTE_WEIGHT = 0.3
_ERAS = ("", "Ancient", "Victorian", "Modern", "Northern", "Southern", "Hidden", "Golden", "Forgotten", "Electric")

THEMES = {
    "space": (
        "Stellar Orbital Cosmic Lunar Astral Solar Galactic Zero-Gravity",
        "Voyage Comet Station Nebula Rocket Colony Satellite Eclipse",
    ),
    "ocean": (
        "Deep Tidal Salty Coral Drifting Stormy Blue Sunken",
        "Reef Captain Harbour Whale Lighthouse Anchor Lagoon Current",
    ),
    "garden": (
        "Blooming Wild Mossy Fragrant Leafy Budding Thorny Green",
        "Orchard Rose Greenhouse Seed Meadow Ivy Gardener Fern",
    ),
    "kitchen": (
        "Spicy Roasted Buttery Crispy Sweet Smoked Savoury Rustic",
        "Recipe Bakery Oven Feast Pepper Dumpling Chef Pantry",
    ),
    "crime": (
        "Silent Crooked Guilty Masked Midnight Ruthless Stolen Cold",
        "Detective Alibi Heist Witness Verdict Ransom Suspect Evidence",
    ),
    "romance": (
        "Tender Secret Summer Longing Gentle Reckless Devoted Bittersweet",
        "Wedding Letter Kiss Promise Heart Waltz Reunion Rendezvous",
    ),
    "history": (
        "Royal Imperial Fallen Marble Medieval Bronze Noble Lost",
        "Throne Empire Siege Dynasty Castle Chronicle Crown Legion",
    ),
    "machines": (
        "Mechanical Robotic Wired Digital Steam Automatic Iron Logical",
        "Robot Engine Circuit Android Factory Gear Algorithm Turbine",
    ),
    "mountains": (
        "Frozen High Rocky Alpine Steep Windy Lonely Snowy",
        "Summit Glacier Ridge Avalanche Climber Valley Cabin Trail",
    ),
    "music": (
        "Electric Acoustic Soulful Rhythmic Loud Jazzy Melodic Velvet",
        "Concert Guitar Melody Drummer Orchestra Chorus Record Encore",
    ),
    "sports": (
        "Winning Fearless Final Rapid Underdog Olympic Muddy Undefeated",
        "Champion Stadium Marathon Goal Coach Trophy League Sprint",
    ),
    "magic": (
        "Enchanted Cursed Mystic Arcane Bewitched Spellbound Silver Eldritch",
        "Wizard Dragon Potion Amulet Sorcerer Phoenix Grimoire Unicorn",
    ),
    "desert": (
        "Scorched Sandy Golden Endless Thirsty Dusty Nomadic Burning",
        "Caravan Dune Oasis Mirage Scorpion Canyon Outpost Cactus",
    ),
    "school": (
        "Clever Curious Nervous Brilliant Youthful Studious Rebel Honest",
        "Teacher Exam Classroom Notebook Graduation Library Student Lesson",
    ),
    "animals": (
        "Furry Loyal Playful Hungry Clumsy Tame Feathered Sleepy",
        "Puppy Kitten Fox Rabbit Parrot Otter Pony Hedgehog",
    ),
    "night": (
        "Haunted Shadowy Pale Whispering Eerie Ghostly Bloody Restless",
        "Vampire Graveyard Mansion Phantom Nightmare Coffin Asylum Werewolf",
    ),
}
"""Adjectives and nouns for the item text of each theme."""


@dataclass(frozen=True)
class World:
    """Latent properties of I items with T tastes. `item_tastes` is (I, T), `group_tastes` (groups, T), `seasons` (moments, T)."""

    item_ids: npt.NDArray[Any]
    item_tastes: Floats
    quality: Floats
    group_tastes: Floats
    seasons: Floats
    ordered: Integers
    running_weights: Floats
    series: Integers
    series_place: Integers
    series_bounds: Integers
    main_tastes: Integers

    def draw(self, tastes: Integers, luck: Floats) -> Integers:
        """Draw an item of each taste by popularity, given uniform numbers in [0, 1)."""
        return self.ordered[np.minimum(np.searchsorted(self.running_weights, tastes + luck, side="right"), len(self.ordered) - 1)]

    def follow(self, items: Integers, reach: Integers) -> Integers:
        """Return the item `reach` places after each one in the series of its main taste; a series is circular."""
        first = self.series_bounds[self.main_tastes[items]]
        length = self.series_bounds[self.main_tastes[items] + 1] - first
        return self.series[first + (self.series_place[items] - first + reach) % length]


@lru_cache(maxsize=1)
def build_world(config: SyntheticConfig) -> World:
    """Build the items' tastes, popularity and series, which depend only on the config."""
    random = np.random.default_rng([config.seed, 0])
    num_items, num_tastes = config.num_items, min(config.num_tastes, config.num_items)
    main = random.permutation(np.arange(num_items) % num_tastes)
    second = random.integers(num_tastes, size=num_items)
    item_tastes = np.zeros((num_items, num_tastes))
    item_tastes[np.arange(num_items), second] = _SECOND_TASTE_WEIGHT
    item_tastes[np.arange(num_items), main] = 1.0
    popularity = (random.permutation(num_items) + 3.0) ** -1.0
    tastes, items = np.nonzero(item_tastes.T)
    weights = popularity[items] * item_tastes[items, tastes]
    totals = np.bincount(tastes, weights, num_tastes)
    within = np.concatenate([np.cumsum(weights[tastes == taste]) / totals[taste] for taste in range(num_tastes)])
    series = np.lexsort((random.random(num_items), main))
    return World(
        item_ids=np.array([f"i{number:06d}" for number in range(1, num_items + 1)]),
        item_tastes=item_tastes,
        quality=random.normal(0, 1, num_items),
        group_tastes=random.dirichlet(np.full(num_tastes, 0.5), _NUM_GROUPS),
        seasons=np.exp(0.8 * np.sin(2 * np.pi * (np.arange(_YEAR_MOMENTS)[:, None] / _YEAR_MOMENTS + random.random(num_tastes)))),
        ordered=items,
        running_weights=tastes + within,
        series=series,
        series_place=np.argsort(series),
        series_bounds=np.searchsorted(main[series], np.arange(num_tastes + 1)),
        main_tastes=main,
    )


def describe_items(config: SyntheticConfig) -> pa.Table:
    """Build the catalogue table: title, description, category (noisy: a quarter of the items have a random main category) and price."""
    world = build_world(config)
    random = np.random.default_rng([config.seed, 2])
    num_tastes = world.item_tastes.shape[1]
    luck = random.random((config.num_items, 8))
    titles, descriptions, categories = [], [], []
    for tastes, main, lucky in zip(world.item_tastes, world.main_tastes.tolist(), luck.tolist(), strict=True):
        second = next((taste for taste in np.flatnonzero(tastes).tolist() if taste != main), main)
        adjectives, nouns = _words(main)
        side_adjectives, side_nouns = _words(second)
        noun = _pick(nouns, lucky[0])
        other_noun = _pick([word for word in nouns if word != noun], lucky[1])
        titles.append(f"The {_pick(adjectives, lucky[2])} {noun} and the {_pick(side_nouns, lucky[3])}")
        side = f"{_pick(side_adjectives, lucky[4])} {_pick(side_nouns, lucky[5])}"
        descriptions.append(f"A {_pick(adjectives, lucky[6])} tale of {noun} and {other_noun}, with a {side}".capitalize())
        shown = main if lucky[7] < 0.75 else int((lucky[7] - 0.75) * 4 * num_tastes)
        categories.append(sorted({taste_name(shown), taste_name(second)}))
    prices = np.round(np.exp(2.5 + 0.4 * world.quality + 0.3 * random.normal(size=len(titles))), 2)
    return pa.table({"item_id": world.item_ids, "title": titles, "description": descriptions, "category": categories, "price": prices})


def _pick(words: list[str], luck: float) -> str:
    return words[int(luck * len(words))]


@lru_cache(maxsize=10_000)
def taste_name(taste: int) -> str:
    """Return a taste's name: its theme, or, past the end of the list of themes, a theme with an era."""
    theme = list(THEMES)[taste % len(THEMES)]
    return " ".join(part for part in (_era(taste).lower(), theme) if part)


@lru_cache(maxsize=10_000)
def _words(taste: int) -> tuple[list[str], list[str]]:
    adjectives, nouns = THEMES[list(THEMES)[taste % len(THEMES)]]
    era = _era(taste)
    return [" ".join(part for part in (era, word) if part) for word in adjectives.split()], nouns.split()


def _era(taste: int) -> str:
    era = taste // len(THEMES)
    return _ERAS[era] if era < len(_ERAS) else f"Era-{era}"
