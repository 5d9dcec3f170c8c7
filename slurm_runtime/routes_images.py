"""The routes of images: is one here, build one, how far is a build. Only the legacy clients use them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from starlette.requests import ClientDisconnect

from slurm_runtime.builds import Build, Builds
from slurm_runtime.config import ServerConfig
from slurm_runtime.manager import Manager
from slurm_runtime.models import BuildAnswer, BuildStatusAnswer, ImageDetails, ImageExistsAnswer, PrefixAnswer
from slurm_runtime.openapi import errors
from slurm_runtime.podman import NoSuchImage, PullFailed
from slurm_runtime.routes_sandboxes import HungUp
from slurm_runtime.wishes import BadRequest

BUILD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["context", "target_image"],
                    "properties": {
                        "context": {"type": "string", "description": "Base64 text of a tar.gz with a Dockerfile."},
                        "target_image": {"type": "string", "description": "Name of the image to build."},
                        "tags": {"type": "array", "items": {"type": "string"}, "description": "Further names of it."},
                        "use_cache": {"type": "string", "description": "Accepted; layers are always cached."},
                    },
                }
            }
        },
    }
}

ImageName = Annotated[str, Query(min_length=1, max_length=1024, pattern=r"^[^\x00-\x20\x7f]+$")]


class BuildingIsOff(Exception):
    """This server builds no images."""


def own_address(request: Request) -> str:
    """The address under which the client reached this server: right through tunnels and other names too."""
    return str(request.base_url).rstrip("/")


def status_answer(build: Build) -> BuildStatusAnswer:
    return BuildStatusAnswer(
        build_id=build.build_id,
        status=build.status,
        image=build.image,
        error=build.error or None,
        progress=build.progress or None,
    )


async def find_image(manager: Manager, name: str, pull: bool) -> ImageDetails | None:
    """The image in this node's store, fetched first where asked for; None where it is not to be had.

    One that another node has left for all counts as being here, too.
    """
    try:
        facts = await (manager.images.need(name, "missing") if pull else manager.images.find(name))
    except (NoSuchImage, PullFailed):
        return None
    return ImageDetails(upload_time=facts.created, image_size_bytes=facts.size_bytes)


def add_image_routes(app: FastAPI, manager: Manager, config: ServerConfig, builds: Builds) -> None:
    @app.get("/registry_prefix", responses=errors())
    async def registry_prefix() -> PrefixAnswer:
        """What the names of built images begin with."""
        return PrefixAnswer(registry_prefix=config.registry_prefix)

    @app.get("/image_exists", response_model_exclude_none=True, responses=errors(502, 504))
    async def image_exists(request: Request, image: ImageName, pull_from_repo: bool = False) -> ImageExistsAnswer:
        """Whether an image is here; with pull_from_repo it is fetched first, which may take minutes."""
        found = await find_image(manager, image, pull_from_repo)
        return ImageExistsAnswer(exists=found is not None, url=own_address(request), image=found)

    _add_build_routes(app, config, builds)


def _add_build_routes(app: FastAPI, config: ServerConfig, builds: Builds) -> None:
    def check_on() -> None:
        if not config.build_images:
            raise BuildingIsOff(
                "this server builds no images: set runtime_container_image in the client's sandbox configuration to a "
                "finished image, or start the server with --enable-image-build"
            )

    @app.post("/build", responses=errors(429, 499, 501, 507), openapi_extra=BUILD_BODY)
    async def build(request: Request) -> BuildAnswer:
        """Begin to build an image; the same one again is the same build while it lasts."""
        check_on()
        try:
            begun = await builds.submit(request.stream(), request.headers.get("content-type", ""))
        except ClientDisconnect:
            raise HungUp("the client closed its connection while it sent the context") from None
        return BuildAnswer(build_id=begun.build_id, url=own_address(request), status=begun.status)

    @app.get("/build_status", response_model_exclude_none=True, responses=errors(404, 501))
    async def build_status(build_id: Annotated[str, Query(max_length=256)]) -> BuildStatusAnswer:
        """How far a build is."""
        check_on()
        if not build_id:
            raise BadRequest("build_id is empty")
        return status_answer(builds.get(build_id))
