"""The URLs of the test site. Names are what the tests' policies match."""

from __future__ import annotations

from django.urls import include, path

from . import views

namespaced = ([path("inner/", views.told, name="inner"), path("inner/<int:pk>/", views.told, name="inner-pk")], "shop")

urlpatterns = [
    path("plain/", views.plain, name="plain"),
    path("aplain/", views.aplain, name="aplain"),
    path("fails/", views.fails, name="fails"),
    path("afails/", views.afails, name="afails"),
    path("stream/", views.stream, name="stream"),
    path("astream/", views.astream, name="astream"),
    path("astream-from-sync/", views.astream_from_sync, name="astream-from-sync"),
    path("stream-from-async/", views.stream_from_async, name="stream-from-async"),
    path("file/", views.file, name="file"),
    path("afile/", views.afile, name="afile"),
    path("page/", views.page, name="page"),
    path("class/", views.ClassView.as_view(), name="class"),
    path("aclass/", views.AsyncClassView.as_view(), name="aclass"),
    path("told/", views.told, name="told"),
    path("told/<str:pk>/", views.told, name="told-pk"),
    path("atold/", views.atold, name="atold"),
    path("atold/<str:pk>/", views.atold, name="atold-pk"),
    path("unnamed/", views.told),
    path("exempt/", views.exempt, name="exempt"),
    path("decorated/", views.decorated, name="decorated"),
    path("adecorated/", views.adecorated, name="adecorated"),
    path("decorated-class/", views.DecoratedClass.as_view(), name="decorated-class"),
    path("adecorated-class/", views.AsyncDecoratedClass.as_view(), name="adecorated-class"),
    path("shop/", include(namespaced, namespace="shop")),
    path("shop2/", include(namespaced, namespace="second")),
    path("busy/sync/", views.busy, name="busy-sync"),
    path("busy/async/", views.abusy, name="busy-async"),
    path("busy/class/", views.BusyClass.as_view(), name="busy-class"),
    path("busy/async-class/", views.AsyncBusyClass.as_view(), name="busy-async-class"),
    path("busy/stream/", views.busy_stream, name="busy-stream"),
    path("busy/async-stream/", views.abusy_stream, name="busy-async-stream"),
    path("busy/raising/", views.busy_raising, name="busy-raising"),
    path("-/held/", views.holders, name="held"),
]

urlpatterns += [
    path("whoami/", views.whoami, name="whoami"),
    path("awhoami/", views.awhoami, name="awhoami"),
    path("team/", views.team, name="team"),
    path("ateam/", views.ateam, name="ateam"),
]
