{
  "targets": [{ "target_name": "page", "sources": ["page.c"] }]
}
