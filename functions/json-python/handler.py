"""Parses, transforms and answers parts of a large JSON document that is made at start."""

import json
import random
import secrets
import threading

INIT_ID = secrets.token_hex(8)
_LOCK = threading.Lock()
_counter = 0


def _document(people):
    chance = random.Random(INIT_ID)
    cities = ["Basel", "Cork", "Fes", "Kyoto", "Lima", "Oslo", "Pune", "Turin"]
    return json.dumps(
        {
            "people": [
                {
                    "id": number,
                    "name": f"person {chance.getrandbits(40):010x}",
                    "city": chance.choice(cities),
                    "age": chance.randint(1, 99),
                    "scores": [round(chance.random() * 100, 3) for _ in range(8)],
                    "friends": [chance.randrange(people) for _ in range(5)],
                }
                for number in range(people)
            ]
        }
    )


_PEOPLE = 12_000
_TEXT = _document(_PEOPLE)
_PARSED = json.loads(_TEXT)


def _by_city(people):
    cities = {}
    for person in people:
        city = cities.setdefault(person["city"], {"people": 0, "age": 0, "best": 0.0})
        city["people"] += 1
        city["age"] += person["age"]
        city["best"] = max(city["best"], *person["scores"])
    for city in cities.values():
        city["age"] = round(city["age"] / city["people"], 2)
    return dict(sorted(cities.items()))


def handle(body, query):
    global _counter
    with _LOCK:
        _counter += 1
        count = _counter
    if body.strip():
        people = json.loads(body)["people"]
    elif query.get("parse"):
        # The whole document again, several megabytes of it.
        people = json.loads(_TEXT)["people"]
    else:
        share = int(query.get("share", "20"))
        people = _PARSED["people"][:: max(1, share)]
    return {
        "counter": count,
        "init_id": INIT_ID,
        "document_bytes": len(_TEXT),
        "people": len(people),
        "cities": _by_city(people),
    }
