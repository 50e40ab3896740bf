//! Asks a server's control interface.

use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::UnixStream;

use super::api::{ApiError, Request};
use crate::model::Address;

/// A server that is well says so within this.
const STATUS_MAX: Duration = Duration::from_secs(5);
/// Largest answer, in bytes.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("cannot reach a server at {address}: {reason}. Is it running? Give its socket with --control unix:PATH or TIDEGATE_CONTROL")]
    Unreachable {
        /// Where.
        address: String,
        /// Why.
        reason: String,
    },
    /// The server says no.
    #[error("{0}")]
    Refused(String),
    /// The answer cannot be understood.
    #[error("the server's answer cannot be understood ({0}): do both sides have the same version?")]
    Answer(String),
}

/// Sends one request and waits for its answer.
///
/// # Errors
/// [`ClientError`].
pub async fn call<T: DeserializeOwned>(address: &Address, request: &Request) -> Result<T, ClientError> {
    let unreachable = |reason: String| ClientError::Unreachable { address: address.to_string(), reason };
    let Address::Unix(path) = address else {
        return Err(unreachable("control over TCP is not available in this version".to_owned()));
    };
    let stream = UnixStream::connect(path).await.map_err(|e| unreachable(e.to_string()))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| unreachable(e.to_string()))?;
    let driver = tokio::spawn(connection);
    let body = serde_json::to_vec(request).map_err(|e| ClientError::Answer(e.to_string()))?;
    let http = hyper::Request::post("/v1/call")
        .header("host", "tidegate")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)));
    let http = http.map_err(|e| ClientError::Answer(e.to_string()))?;
    let answer = sender.send_request(http);
    // Whether it is well is asked of servers that hang, too; everything else takes as long as it takes.
    let limit = if matches!(request, Request::Status) { STATUS_MAX } else { Duration::MAX };
    let response = tokio::time::timeout(limit, answer).await;
    let response = response.map_err(|_| unreachable(format!("it does not answer within {} s", STATUS_MAX.as_secs())))?;
    let response = response.map_err(|e| unreachable(e.to_string()))?;
    let ok = response.status().is_success();
    let bytes =
        Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await.map_err(|e| ClientError::Answer(e.to_string()))?.to_bytes();
    driver.abort();
    if !ok {
        let error: ApiError =
            serde_json::from_slice(&bytes).map_err(|_| ClientError::Refused(String::from_utf8_lossy(&bytes).into_owned()))?;
        return Err(ClientError::Refused(error.message));
    }
    serde_json::from_slice(&bytes).map_err(|e| ClientError::Answer(e.to_string()))
}
