"""The API of the reports, by Django REST framework: whose token it is, is known inside the view only.

So the policies of the table are taken by ConcurrencyThrottle, after authentication and permissions.
"""

from __future__ import annotations

import time

from example import gauge
from rest_framework.authentication import TokenAuthentication
from rest_framework.permissions import IsAuthenticated
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from django_concurrency_mw.drf import ConcurrencyThrottle

from .views import REGIONS, seconds


class OrdersView(APIView):
    """All orders, for programs: `Authorization: Token ...`, one that `manage.py demo_users` tells."""

    authentication_classes = (TokenAuthentication,)
    permission_classes = (IsAuthenticated,)
    throttle_classes = (ConcurrencyThrottle,)

    def get(self, request: Request) -> Response:
        duration = seconds(request)
        with gauge.inside(f"orders:{request.user.get_username()}"):
            time.sleep(duration)
        return Response({"orders": {region: len(places) for region, places in REGIONS.items()}, "seconds": duration})
