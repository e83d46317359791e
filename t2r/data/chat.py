"""Chats -> tokens: by the source's own template, and only what the assistant says is to be learned."""

from collections.abc import Sequence

from t2r.errors import UserError

Messages = list[dict]


def encode_chats(tokenizer, chats: Sequence[Messages], where: str) -> list[tuple[list[int], list[bool]]]:
    """(ids, learned) of each chat. learned: the tokens of the assistant's turns, with the mark that ends a turn.

    Raises UserError where the tokenizer has no template, or one that writes a turn differently once others follow.
    """
    if not chats:
        return []
    if not tokenizer.chat_template:
        raise UserError("the data holds messages, but the source's tokenizer has no chat template", where=where)
    rendered = [render(tokenizer, messages, where) for messages in chats]
    texts = [text for text, _ in rendered]
    # the template writes the special tokens itself
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    result = []
    for ids, offsets, (_, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True):
        learned = [any(begin <= low < high <= end for begin, end in spans) for low, high in offsets]
        result.append((ids, learned))
    return result


def render(tokenizer, messages: Messages, where: str) -> tuple[str, list[tuple[int, int]]]:
    """A chat as text, and where in it (from, to) the assistant's turns are: after what would make it answer."""

    def template(turns: Messages, **options) -> str:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)

    try:
        text, spans = template(messages), []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = template(messages[:i], add_generation_prompt=True), template(messages[: i + 1])
                if not (text.startswith(after) and after.startswith(before)):
                    raise UserError("the chat template writes a turn differently once others follow", where=where)
                spans.append((len(before), len(after)))
    except UserError:
        raise
    except Exception as error:  # templates raise what they please
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the chat template cannot write a chat: {first}", where=where) from error
    return text, spans
