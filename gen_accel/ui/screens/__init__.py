"""The screens of the page, a file each with `build(page)`."""
