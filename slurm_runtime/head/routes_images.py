"""The routes of images at the head: all builds go to one node, an image is looked for on all of them."""

from __future__ import annotations

import asyncio
from typing import Annotated
from urllib.parse import urlencode

from fastapi import FastAPI, Query, Request, Response
from starlette.requests import ClientDisconnect

from slurm_runtime.builds import UnknownBuild
from slurm_runtime.entries import NoRoom
from slurm_runtime.guard import BUILD_BODY_S
from slurm_runtime.head.answers import packed
from slurm_runtime.head.fleet import Node
from slurm_runtime.head.link import CutOff, NotSent, Reply
from slurm_runtime.head.members import Members, NodeAway
from slurm_runtime.head.routes_sandboxes import passed
from slurm_runtime.head.wish import named
from slurm_runtime.models import BuildAnswer, BuildStatusAnswer, ImageExistsAnswer, PrefixAnswer
from slurm_runtime.openapi import errors
from slurm_runtime.routes_images import BUILD_BODY, ImageName, own_address
from slurm_runtime.routes_sandboxes import HungUp

BUILDS_KEPT = 1000
PULL_S = 1800.0  # as long as clients wait for an image that is fetched first


class Images:
    """Which node is asked about images and builds."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._builds: dict[str, str] = {}

    def nodes(self) -> list[Node]:
        """All that are here, those that take sandboxes first; the first one builds, always the same."""
        taking = {node.name for node in self._members.taking()}
        here = [node for node in self._members.here() if node.facts is not None]
        if not here:
            raise NoRoom("no node has joined yet; GET /nodes tells when one has")
        return sorted(here, key=lambda node: (node.name not in taking, node.name))

    async def prefix(self) -> Reply:
        return await self._members.ask(self.nodes()[0].name, "GET", "/registry_prefix")

    async def find(self, image: str, pull: bool, host: str) -> Reply:
        """The answer of a node that has the image, else that of the first one, which fetches it if asked to."""
        name = named(image)
        nodes = self.nodes()
        having = [node for node in nodes if name in node.images]
        path = "/image_exists?" + urlencode({"image": image})
        replies = await asyncio.gather(*(self._about(node, path, host) for node in having or nodes))
        good = [reply for reply in replies if reply is not None and b'"exists":true' in reply.body]
        if good or not pull:
            return (good or [reply for reply in replies if reply is not None] or [_no_answer(nodes)])[0]
        return await self._ask(nodes[0], path + "&pull_from_repo=true", host, PULL_S)

    async def build(self, request: Request, host: str) -> Reply:
        node = self.nodes()[0]
        link = self._members.link(node.name)
        headers = {"Host": host, "Content-Type": request.headers.get("content-type", "")}
        try:
            if link is None:
                raise NotSent("it is gone")
            reply = await link.ask("POST", "/build", request.stream(), headers, BUILD_BODY_S + 60)
        except (NotSent, CutOff) as problem:
            raise NodeAway(f"{node.called}, which builds images, does not answer: {problem}") from None
        if reply.is_good:
            self._note(BuildAnswer.model_validate_json(reply.body).build_id, node.name)
        return reply

    async def status(self, build_id: str) -> Reply:
        """Of the node that builds it; after a restart of the head, of whichever knows it."""
        nodes = {node.name: node for node in self.nodes()}
        at = self._builds.get(build_id)
        for name in [at] if at in nodes else list(nodes):
            assert name is not None
            reply = await self._members.ask(name, "GET", "/build_status?" + urlencode({"build_id": build_id}))
            if reply.status != 404:
                self._note(build_id, name)
                return reply
        raise UnknownBuild(f"no build with build_id {build_id!r}, or it ended long ago, or its node is gone")

    async def _about(self, node: Node, path: str, host: str) -> Reply | None:
        try:
            return await self._ask(node, path, host)
        except NodeAway:
            return None

    async def _ask(self, node: Node, path: str, host: str, timeout_s: float = 60.0) -> Reply:
        link = self._members.link(node.name)
        try:
            if link is None:
                raise NotSent("it is gone")
            return await link.ask("GET", path, headers={"Host": host}, timeout_s=timeout_s)
        except (NotSent, CutOff) as problem:
            raise NodeAway(f"{node.called} does not answer: {problem}; ask again") from None

    def _note(self, build_id: str, node: str) -> None:
        self._builds[build_id] = node
        if len(self._builds) > BUILDS_KEPT:
            del self._builds[next(iter(self._builds))]


def _no_answer(nodes: list[Node]) -> Reply:
    return Reply(502, packed({"detail": f"none of {len(nodes)} nodes answers; ask again"}))


def add_image_routes(app: FastAPI, images: Images) -> None:
    @app.get("/registry_prefix", response_model=PrefixAnswer, responses=errors(502, 503))
    async def registry_prefix() -> Response:
        """What the names of built images begin with."""
        return passed(await images.prefix())

    @app.get("/image_exists", response_model=ImageExistsAnswer, responses=errors(502, 503, 504))
    async def image_exists(request: Request, image: ImageName, pull_from_repo: bool = False) -> Response:
        """Whether an image is on a node; with pull_from_repo one fetches it first, which may take minutes."""
        return passed(await images.find(image, pull_from_repo, _host(request)))

    @app.post(
        "/build", response_model=BuildAnswer, responses=errors(429, 499, 501, 502, 503, 507), openapi_extra=BUILD_BODY
    )
    async def build(request: Request) -> Response:
        """Begin to build an image on the node that builds; the same one again is the same build while it lasts."""
        try:
            return passed(await images.build(request, _host(request)))
        except ClientDisconnect:
            raise HungUp("the client closed its connection while it sent the context") from None

    @app.get("/build_status", response_model=BuildStatusAnswer, responses=errors(404, 501, 502, 503))
    async def build_status(build_id: Annotated[str, Query(max_length=256)]) -> Response:
        """How far a build is."""
        return passed(await images.status(build_id))


def _host(request: Request) -> str:
    """The address under which the client reached the head: later calls go there too."""
    return own_address(request).partition("://")[2]
