"""`python -m fsu_ray` is `fsu`, where the package was sent to a machine and not installed there."""

from fsu_ray.cli import main

if __name__ == "__main__":
    main()
