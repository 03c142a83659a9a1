import functitan as ft

x = ft.random.normal(ft.random.key(0), (64, 8))
params = ft.init({"w": ft.Param("embed mlp", (8, 8))}, ft.random.key(1))
loss = lambda p: ft.reduce("batch mlp ->", (ft.einsum("batch embed, embed mlp -> batch mlp", x, p["w"]) - x) ** 2)
tx = ft.optim.adamw(5e-2, weight_decay=0.0)
state = tx.init(params)
for _ in range(60):
    value, grads = ft.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    params = ft.optim.apply_updates(params, updates)
