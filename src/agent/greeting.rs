//! Reaching a process server: TLS, both names, the welcome; and asking another one whether it would be the better choice.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::spill::SpillError;
use crate::checksum;
use crate::config::limits::SILENCE_SECONDS;
use crate::crypto::pki::{PkiError, Role};
use crate::crypto::tls::{ALPN_INGEST, Credentials, TlsError, peer_identity, server_name};
use crate::model::{MachineId, Name};
use crate::wire::ingest::{AgentMessage, FRAME_LEN, Frame, FrameType, ServerMessage, control_frame};
use crate::wire::{WireError, decode_control};

/// Why a session ended.
#[derive(Debug, Error)]
pub(super) enum SessionError {
    #[error("cannot reach the process server at {0}: {1}")]
    Connect(String, io::Error),
    #[error("the process server at {0} did not answer in time")]
    Timeout(String),
    #[error("TLS with the process server failed ({0}): check that both certificates come from one CA and have not expired")]
    Handshake(io::Error),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Identity(#[from] PkiError),
    #[error("connection lost: {}", lost(.0))]
    Io(#[from] io::Error),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("the process server said nothing for {SILENCE_SECONDS} s")]
    Silent,
    #[error("the process server ended the connection: {0}")]
    Goodbye(String),
    #[error("no disk was taken by the process server at {0} for too long")]
    NotServed(String),
    #[error("the process server is to be taken out of service")]
    Draining,
    #[error("the process server is cut off from the master target, and another one is not: going there")]
    CutOff(usize),
    #[error("the process server is to be taken out of service, and another one is not: going there")]
    Leaves(usize),
    #[error("the agent's log: {0}")]
    Spill(#[from] SpillError),
    #[error("the capture thread has ended")]
    Stopped,
}

/// A library's words for an end without a goodbye help nobody.
fn lost(error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::UnexpectedEof { "the process server ended it without a word".to_owned() } else { error.to_string() }
}

/// Connects, and is welcomed within `limit`. Answers the connection and the process server's name, by its certificate.
pub(super) async fn greet(
    credentials: &Credentials,
    machine: MachineId,
    address: &str,
    limit: Duration,
) -> Result<(TlsStream<TcpStream>, Name), SessionError> {
    let connect = async {
        let tcp = TcpStream::connect(address).await.map_err(|e| SessionError::Connect(address.to_owned(), e))?;
        tcp.set_nodelay(true)?;
        let connector = TlsConnector::from(Arc::new(credentials.client(ALPN_INGEST)?));
        let mut tls = connector.connect(server_name(Role::ProcessServer), tcp).await.map_err(SessionError::Handshake)?;
        let identity = peer_identity(tls.get_ref().1.peer_certificates(), Role::ProcessServer)?;
        tls.get_mut().1.set_buffer_limit(Some(1 << 20));
        let hello = control_frame(&AgentMessage::Hello { machine })?;
        tls.write_all(&hello).await?;
        let mut buffer = Vec::new();
        match read_message(&mut tls, &mut buffer).await? {
            ServerMessage::Welcome => Ok((tls, identity.name)),
            ServerMessage::Draining => Err(SessionError::Draining),
            ServerMessage::Goodbye { message } => Err(SessionError::Goodbye(message)),
            _ => Err(WireError::Illegal("first message of the process server").into()),
        }
    };
    tokio::time::timeout(limit, connect).await.map_err(|_| SessionError::Timeout(address.to_owned()))?
}

/// Whether a process server answers within `limit`, reaches its master target, and is there to stay. Opens no disk: whoever is asked
/// takes nothing away from the one that serves now.
pub(super) async fn is_better(credentials: &Credentials, machine: MachineId, address: &str, limit: Duration) -> bool {
    let asked = async {
        let (mut tls, _) = greet(credentials, machine, address, limit).await.ok()?;
        let mut buffer = Vec::new();
        loop {
            match read_message(&mut tls, &mut buffer).await.ok()? {
                ServerMessage::Link { up } => return Some(up),
                ServerMessage::Draining | ServerMessage::Goodbye { .. } => return None,
                _ => {}
            }
        }
    };
    tokio::time::timeout(limit, asked).await.ok().flatten().unwrap_or(false)
}

/// Reads one message.
pub(super) async fn read_message<R: tokio::io::AsyncRead + Unpin>(
    read: &mut R,
    buffer: &mut Vec<u8>,
) -> Result<ServerMessage, SessionError> {
    let mut header = [0; FRAME_LEN];
    read.read_exact(&mut header).await?;
    let frame = Frame::decode(&header)?;
    if frame.kind != FrameType::Control {
        return Err(WireError::Illegal("frame from the process server").into());
    }
    buffer.resize(frame.payload_len as usize, 0);
    read.read_exact(buffer).await?;
    if checksum::crc32c(buffer) != frame.payload_crc {
        return Err(WireError::Checksum("message").into());
    }
    Ok(decode_control(buffer)?)
}
