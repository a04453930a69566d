"""What counts as a breaking change of the public API."""

import copy

import pytest
from openapi_snapshot import breaking_changes


def document():
    return {
        "paths": {
            "/things/{id}": {
                "post": {
                    "x-scopes": ["admin", "monitor"],
                    "parameters": [
                        {"in": "path", "name": "id", "required": True, "schema": {"type": "string"}},
                        {"in": "query", "name": "limit", "schema": {"type": "integer", "minimum": 1, "maximum": 9}},
                    ],
                    "requestBody": {
                        "required": True,
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Wish"}}},
                    },
                    "responses": {
                        "200": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Thing"}}}},
                        "default": {"description": "no"},
                    },
                }
            },
            "/open": {"get": {"x-scopes": [], "responses": {"200": {}}}},
        },
        "components": {
            "schemas": {
                "Wish": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"type": "string", "pattern": "^a"},
                        "size": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                        "kind": {"enum": ["a", "b"]},
                        "tags": {"type": "array", "items": {"type": "string"}},
                        "self": {"$ref": "#/components/schemas/Wish"},
                    },
                },
                "Thing": {
                    "type": "object",
                    "required": ["id", "state"],
                    "properties": {
                        "id": {"type": "string"},
                        "state": {"enum": ["on", "off"]},
                        "note": {"const": "x"},
                        "any": {},
                    },
                },
            }
        },
    }


def post(changed):
    return changed["paths"]["/things/{id}"]["post"]


def schema(changed, name):
    return changed["components"]["schemas"][name]


def changes(change):
    old, new = document(), copy.deepcopy(document())
    change(new)
    return breaking_changes(old, new)


def remove_path(new):
    del new["paths"]["/things/{id}"]


def remove_method(new):
    new["paths"]["/things/{id}"] = {"get": {"responses": {}}}


def need_a_key(new):
    new["paths"]["/open"]["get"]["x-scopes"] = ["monitor"]


def drop_a_scope(new):
    post(new)["x-scopes"] = ["admin"]


def drop_a_parameter(new):
    post(new)["parameters"].pop()


def require_a_parameter(new):
    post(new)["parameters"].append({"in": "query", "name": "why", "required": True, "schema": {}})


def tighten_a_parameter(new):
    post(new)["parameters"][1]["schema"]["maximum"] = 5


def raise_a_minimum(new):
    post(new)["parameters"][1]["schema"]["minimum"] = 2


def drop_the_media_type(new):
    post(new)["requestBody"]["content"] = {"text/plain": {"schema": {}}}


def drop_a_status(new):
    del post(new)["responses"]["200"]


def drop_an_answer_type(new):
    post(new)["responses"]["200"]["content"] = {}


def require_a_field(new):
    schema(new, "Wish")["required"].append("size")


def drop_a_request_field(new):
    del schema(new, "Wish")["properties"]["size"]


def drop_an_answer_field(new):
    del schema(new, "Thing")["properties"]["note"]


def make_an_answer_field_optional(new):
    schema(new, "Thing")["required"].remove("state")


def take_fewer_words(new):
    schema(new, "Wish")["properties"]["kind"]["enum"] = ["a"]


def answer_more_words(new):
    schema(new, "Thing")["properties"]["state"]["enum"].append("unsure")


def take_no_null(new):
    schema(new, "Wish")["properties"]["size"] = {"type": "integer"}


def change_a_type_in_a_list(new):
    schema(new, "Wish")["properties"]["tags"]["items"] = {"type": "integer"}


def change_a_pattern(new):
    schema(new, "Wish")["properties"]["name"]["pattern"] = "^b"


def answer_anything(new):
    schema(new, "Thing")["properties"]["id"] = {}


def require_a_body(new):
    new["paths"]["/open"]["get"]["requestBody"] = {"required": True, "content": {}}


BREAKING = [
    remove_path, remove_method, need_a_key, drop_a_scope, drop_a_parameter, require_a_parameter, tighten_a_parameter,
    raise_a_minimum, drop_the_media_type, drop_a_status, drop_an_answer_type, require_a_field, drop_a_request_field,
    drop_an_answer_field, make_an_answer_field_optional, take_fewer_words, answer_more_words, take_no_null,
    change_a_type_in_a_list, change_a_pattern, answer_anything, require_a_body,
]  # fmt: skip


@pytest.mark.parametrize("change", BREAKING, ids=lambda change: change.__name__)
def test_breaking(change):
    assert len(changes(change)) == 1


def add_things(new):
    post(new)["x-scopes"].append("logs")
    post(new)["parameters"].append({"in": "query", "name": "more", "schema": {"type": "string"}})
    post(new)["responses"]["202"] = {}
    post(new)["requestBody"]["content"]["text/plain"] = {"schema": {}}
    schema(new, "Wish")["properties"]["extra"] = {"type": "string"}
    schema(new, "Wish")["properties"]["kind"]["enum"].append("c")
    schema(new, "Thing")["properties"]["extra"] = {"type": "string"}
    schema(new, "Thing")["required"].append("note")
    schema(new, "Thing")["properties"]["state"]["enum"].remove("off")
    new["paths"]["/more"] = {"get": {"responses": {}}}


def loosen(new):
    new["paths"]["/things/{id}"]["post"]["x-scopes"] = []
    post(new)["requestBody"]["required"] = False
    post(new)["parameters"][1]["schema"] = {"type": "integer", "minimum": 0, "maximum": 99}
    schema(new, "Wish")["properties"]["name"] = {}


@pytest.mark.parametrize("change", [lambda _new: None, add_things, loosen], ids=["nothing", "additions", "loosening"])
def test_not_breaking(change):
    assert changes(change) == []
