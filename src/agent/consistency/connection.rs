//! The connection to the coordinator: TLS 1.3 with certificates both ways, then messages.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::config::limits::HANDSHAKE_SECONDS;
use crate::crypto::messages::{self, MessageError};
use crate::crypto::pki::{PkiError, Role};
use crate::crypto::tls::{peer_identity, server_name};
use crate::model::MachineId;
use crate::wire::consistency::{CoordinatorMessage, MemberMessage};
use crate::wire::{PROTOCOL, WireError};

/// Why there is no connection, or none any more.
#[derive(Debug, Error)]
pub(in crate::agent) enum ConnectionError {
    #[error("cannot reach the coordinator at {0}: {1}")]
    Connect(String, io::Error),
    #[error("the coordinator at {0} did not answer in time")]
    Timeout(String),
    #[error("TLS with the coordinator failed ({0}): check that both certificates come from one CA and have not expired")]
    Handshake(io::Error),
    #[error(transparent)]
    Identity(#[from] PkiError),
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("the coordinator ended the connection: {0}")]
    Goodbye(String),
    #[error("the coordinator could not keep up")]
    Full,
}

/// Connects and is welcomed.
pub(in crate::agent) async fn connect(
    address: &str,
    tls: Arc<ClientConfig>,
    machine: MachineId,
) -> Result<TlsStream<TcpStream>, ConnectionError> {
    let attempt = async {
        let tcp = TcpStream::connect(address).await.map_err(|e| ConnectionError::Connect(address.to_owned(), e))?;
        tcp.set_nodelay(true).map_err(MessageError::from)?;
        let mut stream = TlsConnector::from(tls).connect(server_name(Role::Coordinator), tcp).await.map_err(ConnectionError::Handshake)?;
        peer_identity(stream.get_ref().1.peer_certificates(), Role::Coordinator)?;
        messages::write(&mut stream, &MemberMessage::Hello { protocol: PROTOCOL, machine }).await?;
        match messages::read(&mut stream).await? {
            CoordinatorMessage::Welcome => Ok(stream),
            CoordinatorMessage::Goodbye { message } => Err(ConnectionError::Goodbye(message)),
            _ => Err(MessageError::from(WireError::Illegal("first message of the coordinator")).into()),
        }
    };
    let limit = Duration::from_secs(HANDSHAKE_SECONDS);
    tokio::time::timeout(limit, attempt).await.map_err(|_| ConnectionError::Timeout(address.to_owned()))?
}
