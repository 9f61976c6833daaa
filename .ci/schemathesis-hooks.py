"""What Schemathesis cannot know about the API, each with its reason."""

import json
import re

import schemathesis

NDJSON = "application/x-ndjson"
KEY = "idempotency-key"
MAX_TEXT = 256


@schemathesis.serializer(NDJSON)
def serialize_upload(context, body):
    """Schemathesis does not know this media type, and the schema cannot say that a line is JSON: what is to be
    accepted is sent as a line, anything else as it is."""
    if isinstance(body, bytes):
        return body
    if body and context.case.meta.generation.mode.is_positive:
        return json.dumps(body).encode()
    return body.encode()


@schemathesis.hook
def filter_case(context, case):
    is_upload = case.media_type == NDJSON
    key = (case.headers or {}).get(KEY)
    # An upload is text: another type has no form in which it could be sent.
    if is_upload and not isinstance(case.body, (bytes, str)):
        return False
    # Following has no end, and rules across its fields and the others; tests/it/follow.rs has them.
    followed = {"follow", "tail"} & set(case.query or {})
    if followed or "last-event-id" in (case.headers or {}):
        return False
    # The limit of a search's text is in bytes, and maxLength in characters.
    contains = (case.query or {}).get("contains")
    if isinstance(contains, str) and len(contains) <= MAX_TEXT < len(contains.encode()):
        return False
    # A rule across fields: an upload takes no key.
    if is_upload and key is not None:
        return False
    # Of an optional header with a pattern, the coverage phase takes a wrong value for a right one.
    if key is not None and case.meta.generation.mode.is_positive:
        return re.fullmatch(r'"?[0-9a-fA-F-]{36}"?', key) is not None
    return True
