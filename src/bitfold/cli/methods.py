"""`bitfold methods`."""

from __future__ import annotations

from bitfold.cli.app import Json, app, print_json


@app.command()
def methods(json: Json = False) -> None:
    """List the methods: what each does and needs, and whose it is."""
    from bitfold.recipes.catalog import AUTO, METHODS, to_rows

    rows = to_rows()
    if json:
        print_json({"methods": rows, "default": AUTO})
        return
    from bitfold.cli.tables import table

    cells = [
        (r["name"], r["bits"], "text" if r["data"] else "nothing", r["gradients"], r["time"], r["what"]) for r in rows
    ]
    table(("method", "bits", "needs", "gradients", "time", "what"), cells, left=6)
    print()
    for name, method in METHODS.items():
        if method.paper:
            print(f"{name:<12} {method.paper}")
    print("\ntime: for a billion weights on a laptop. auto, the default, chooses and says why.")
