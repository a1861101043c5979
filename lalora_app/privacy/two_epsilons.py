"""The two ε of shared noise in words: who must be honest for which number."""


def sentences(of_sums: str, alone: str) -> tuple[str, str]:
    """Return one sentence per ε.

    Args:
        of_sums: name of the ε of the sums in the text around.
        alone: name of the ε of a client's uploads alone.
    """
    return (
        f"{of_sums} holds against the server, other clients and users of the model, if the counted "
        "clients run this program, at most privacy.colluding of them help an attacker, and the "
        "server follows the protocol or the clients have pinned their peers.",
        f"{alone} holds against a server that opens a client's uploads after all, whatever the "
        "server and the other clients do; only the client's own program must be unchanged.",
    )
