"""HTTP routers, one module per noun; `app.ROUTERS` lists them."""
