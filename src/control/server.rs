//! Answers the command line over a unix socket. Asks each role in the process; knows none of them.

use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use serde_json::Value;
use tokio::net::UnixListener;

use super::api::{ApiError, Request, RoleStatus};

/// Largest request, in bytes.
const REQUEST_BYTES_MAX: usize = 64 * 1024;

/// What a role answers; `None` if the request is not for it.
pub type Answer<'a> = Pin<Box<dyn Future<Output = Option<Result<Value, ApiError>>> + Send + 'a>>;

/// A role as the control interface sees it.
pub trait Role: Send + Sync {
    /// Its status.
    fn status(&self) -> RoleStatus;
    /// Does a request other than status, for whom the kernel says asks.
    fn call<'a>(&'a self, request: &'a Request, by: &'a str) -> Answer<'a>;
}

/// Who asks.
#[derive(Clone)]
struct Caller(String);

impl Connected<axum::serve::IncomingStream<'_, UnixListener>> for Caller {
    fn connect_info(stream: axum::serve::IncomingStream<'_, UnixListener>) -> Self {
        let told = stream.io().peer_cred().map_or_else(
            |_| "unknown".to_owned(),
            |peer| {
                let uid = peer.uid();
                let process = peer.pid().map_or_else(String::new, |pid| format!(", process {pid}"));
                format!("{} (uid {uid}{process})", user_name(uid))
            },
        );
        Self(told)
    }
}

/// The name of a user of this host.
fn user_name(uid: u32) -> String {
    let text = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let of = |line: &str| {
        let mut fields = line.split(':');
        let (name, id) = (fields.next()?, fields.nth(1)?);
        (id.parse() == Ok(uid)).then(|| name.to_owned())
    };
    text.lines().find_map(of).unwrap_or_else(|| "user".to_owned())
}

/// Listens on `path`, for its owner only. A socket file that nobody listens on is replaced.
///
/// # Errors
/// Names the path and what to do.
pub async fn bind(path: &Path) -> io::Result<UnixListener> {
    let named = |e: io::Error| {
        io::Error::new(
            e.kind(),
            format!("cannot listen on {} for control: {e}; change [control] listen or stop the other server", path.display()),
        )
    };
    if tokio::net::UnixStream::connect(path).await.is_ok() {
        return Err(named(io::ErrorKind::AddrInUse.into()));
    }
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(named)?;
    }
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).map_err(named)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(named)?;
    Ok(listener)
}

/// Serves until the task is dropped.
pub async fn serve(listener: UnixListener, roles: Vec<Arc<dyn Role>>) {
    let router = Router::new().route("/v1/call", post(call)).layer(DefaultBodyLimit::max(REQUEST_BYTES_MAX)).with_state(Arc::new(roles));
    if let Err(error) = axum::serve(listener, router.into_make_service_with_connect_info::<Caller>()).await {
        tracing::error!(%error, "the control interface ended");
    }
}

async fn call(
    State(roles): State<Arc<Vec<Arc<dyn Role>>>>,
    ConnectInfo(caller): ConnectInfo<Caller>,
    Json(request): Json<Request>,
) -> Response {
    if matches!(request, Request::Status) {
        let all: Vec<RoleStatus> = roles.iter().map(|r| r.status()).collect();
        return Json(all).into_response();
    }
    for role in roles.iter() {
        match role.call(&request, &caller.0).await {
            Some(Ok(value)) => return Json(value).into_response(),
            Some(Err(error)) => return (StatusCode::UNPROCESSABLE_ENTITY, Json(error)).into_response(),
            None => {}
        }
    }
    let names: Vec<String> = roles.iter().map(|r| r.status().role).collect();
    let who = match request {
        Request::Drain { .. } => "a process server",
        Request::Mark { .. } | Request::Resume { .. } | Request::VerifyDisk { .. } => "the agent of the machine",
        Request::Groups
        | Request::GroupCreate { .. }
        | Request::GroupChange { .. }
        | Request::GroupSet { .. }
        | Request::GroupDelete { .. }
        | Request::GroupMark { .. } => "the coordinator (for example unix:/run/tidegate/coordinator.sock)",
        _ => "the master target",
    };
    let message = format!("this server ({}) does not do that: give --control with the socket of {who}", names.join(", "));
    (StatusCode::UNPROCESSABLE_ENTITY, Json(ApiError { message })).into_response()
}
