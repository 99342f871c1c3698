"""The summary that the pipeline prints at its end, and the sample requests to the service that it shows."""

import json
import time
import urllib.request
import uuid
from typing import Any

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.store import Storage
from recsys.terminal import format_settings

NUM_USERS = 3
SHOWN_HISTORY = 5
SHOWN_ITEMS = 5
EVENT_SECONDS = 1.0


def ask_users(config: Config, url: str, token: str, dataset_uri: str) -> list[dict[str, Any]]:
    """Request recommendations for some users from the running service; return them with the ends of the users' histories.

    For the first user, two more lists show what the service does with an event that has just happened, and with a filter.
    """
    dataset = Dataset.open(Storage.from_config(config.storage), dataset_uri)
    columns = (dataset.catalogue[name].to_pylist() for name in ("item_index", "title", "item_id"))
    names = {index: title or item_id for index, title, item_id in zip(*columns, strict=True)}
    users = dataset.read_shard(dataset.manifest.users_shards[0], ["user_id", "items"]).slice(0, NUM_USERS).to_pylist()
    answers = []
    for user in users:
        answer = _recommend(url, token, user["user_id"])
        answers.append(
            {
                "user_id": user["user_id"],
                "history": [names[index] for index in user["items"][-SHOWN_HISTORY:]],
                "recommendations": _titles(answer),
                "version": answer["version"],
            }
        )
    if answers and config.service.live != "off":
        answers[0] |= _after_an_event(url, token, users[0]["user_id"])
    if answers and dataset.manifest.category_vocabulary:
        column, _, value = dataset.manifest.category_vocabulary[0].partition("=")
        filtered = _recommend(url, token, users[0]["user_id"], filter={column: value})
        answers[0]["filtered"] = {"filter": f"{column} = {value}", "recommendations": _titles(filtered)}
    return answers


def _after_an_event(url: str, token: str, user_id: str) -> dict[str, Any]:
    """Post an event of a user with the best item, and return the list once it has changed."""
    items = _recommend(url, token, user_id)["items"]
    best, before = items[0], [item["item_id"] for item in items]
    post(f"{url}/v1/events", {"events": [{"event_id": uuid.uuid4().hex, "user_id": user_id, "item_id": best["item_id"]}]}, token)
    deadline = time.monotonic() + EVENT_SECONDS
    while True:
        answer = _recommend(url, token, user_id)
        if [item["item_id"] for item in answer["items"]] != before or time.monotonic() > deadline:
            return {"event": best["title"] or best["item_id"], "after": _titles(answer)}
        time.sleep(0.01)


def _recommend(url: str, token: str, user_id: str, **fields: Any) -> Any:
    return post(f"{url}/v1/recommend", {"user_id": user_id, "limit": SHOWN_ITEMS, **fields}, token)


def _titles(answer: dict[str, Any]) -> list[str]:
    return [item["title"] or item["item_id"] for item in answer["items"]]


def post(url: str, body: dict[str, Any], token: str) -> Any:
    """Post JSON with a bearer token and return the JSON answer."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def render(config: Config, results: dict[str, Any]) -> str:
    """Format the results as text; a stage that did not run is left out."""
    lines = ["", "=" * 100]
    if data := results.get("prepare_data"):
        counts = f"{data['num_users']} users, {data['num_items']} items, {data['num_interactions']} interactions"
        lines += [f"data       {counts}; rejected: {data['rejected'] or 'none'}"]
    for name in ("train", "train_id_only"):
        if train := results.get(name):
            speed = f"{train['steps']} steps, {train['samples_per_second']:.0f} samples/s"
            reached = _number(train["validation"][config.evaluation.metric])
            lines += [f"{name:<14} {speed}, validation {config.evaluation.metric} {reached}, {train['wall_seconds']} s"]
    if search := results.get("search"):
        lines += ["", f"search     {search['num_trials']} trials by validation {search['metric']}, {search['wall_seconds']} s"]
        for trial in search["leaderboard"]:
            values = format_settings({key.partition(".")[2]: value for key, value in trial["values"].items()}, 2)
            lines += [f"  {_number(trial['metric'])}  {trial['epochs']:>3} epochs  {trial['status']:<8}  {values}"]
    if "evaluate" in results:
        lines += ["", *_test_table(config, results)]
    for answer in results.get("recommendations", []):
        lines += _lists(answer)
    if serve := results.get("serve"):
        user = str(results["recommendations"][0]["user_id"]) if results.get("recommendations") else "1"
        token = "the token of $" + config.service.token_env + f", or in {config.run.scratch}/service.token"
        lines += ["", f"service    {serve['url']} answers with version {serve['version']}; bearer token: {token}"]
        lines += [
            f"           ask it: curl {serve['url']}/v1/recommend \\",
            f'             -H "Authorization: Bearer $(cat {config.run.scratch}/service.token)" \\',
            f"             -H 'Content-Type: application/json' -d '{json.dumps({'user_id': user, 'limit': SHOWN_ITEMS})}'",
            f"           read about it: {serve['url']}/docs",
            "           stop it: make stop (or python -m serve.stop)",
        ]
    lines += ["", f"wall time  {results['seconds']} s", "=" * 100]
    return "\n".join(lines)


def _test_table(config: Config, results: dict[str, Any]) -> list[str]:
    evaluation = results["evaluate"]
    rows = {"model": evaluation["metrics"], **evaluation["baselines"]}
    if "evaluate_id_only" in results:
        rows["id only"] = results["evaluate_id_only"]["metrics"]
    cutoff = config.evaluation.ranking_metric.partition("@")[2]
    names = [f"{name}@{cutoff}" for name in ("hr", "ndcg", "mrr", "coverage")]
    ranking = {row: metrics for row, metrics in rows.items() if names[0] in metrics}  # some baselines only predict tasks
    width = max(map(len, ranking))
    lines = [
        f"{evaluation['split']} of {evaluation['num_users']} users; {evaluation['protocol']}",
        " " * (2 + width) + "".join(f"{name:>14}" for name in names),
    ]
    lines += [f"  {row:<{width}}" + "".join(f"{metrics[name]:>14.4f}" for name in names) for row, metrics in ranking.items()]
    tasks = [(name, value) for name, value in evaluation["metrics"].items() if "." in name and not name.endswith("num_labels")]
    shown = ", ".join(f"{name} {_number(value)}" for name, value in tasks)
    absent = [f"  no metrics of {name}: {why}" for name, why in evaluation["absent_tasks"].items()]
    return [*lines, *([f"  tasks      {shown}"] if tasks else []), *absent, f"  report     {evaluation['report']}"]


def _lists(answer: dict[str, Any]) -> list[str]:
    lists = {"did": answer["history"], "may like": answer["recommendations"]}
    if "after" in answer:
        lists |= {"event": [answer["event"]], "then": answer["after"]}
    if filtered := answer.get("filtered"):
        lists[f"only {filtered['filter']}"] = filtered["recommendations"]
    return ["", f"user {answer['user_id']}", *(f"  {name:<12} {' | '.join(titles) or 'nothing'}" for name, titles in lists.items())]


def _number(value: float | None) -> str:
    return "   -  " if value is None else f"{value:.4f}"
