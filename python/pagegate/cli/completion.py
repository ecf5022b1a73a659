"""Completion in bash, which breaks a word at its colons: FILE:NAME is three words there."""

from __future__ import annotations

import os

from click.shell_completion import BashComplete, add_completion_class, split_arg_string

_SOURCE = """\
%(complete_func)s() {
    local IFS=$'\\n' response completion type value word
    COMPREPLY=()
    response=$(env COMP_WORDS="${COMP_LINE:0:COMP_POINT}" %(complete_var)s=bash_complete "$1")
    # What is before the last colon is there already.
    word="${COMP_LINE:0:COMP_POINT}" word="${word##* }"
    [[ $word == *:* && $COMP_WORDBREAKS == *:* ]] && word="${word%%"${word##*:}"}" || word=""
    for completion in $response; do
        IFS=',' read -r type value <<< "$completion"
        if [[ $type == dir ]]; then
            compopt -o dirnames
        elif [[ $type == file ]]; then
            compopt -o default
        elif [[ $type == plain ]]; then
            COMPREPLY+=("${value#"$word"}")
        fi
    done
    return 0
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


@add_completion_class
class Bash(BashComplete):
    """Completes the words of the line up to the cursor, separated by blanks."""

    source_template = _SOURCE

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the last, and the last, which is empty after a blank."""
        # With one character more: it begins a word after a blank, but not after one in quotes.
        *words, last = split_arg_string(f"{os.environ['COMP_WORDS']}.")
        return words[1:], last[:-1] if words else ""
