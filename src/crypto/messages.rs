//! Control messages over a connection: length, then postcard bytes; bounded before anything is allocated.

use std::io;
use std::time::Duration;

use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::config::limits::SILENCE_SECONDS;
use crate::wire::{WireError, control_len, decode_control, encode_control};

/// Why there is no message.
#[derive(Debug, Error)]
pub enum MessageError {
    /// The connection.
    #[error("connection lost: {0}")]
    Io(#[from] io::Error),
    /// The bytes.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Both sides speak at least once a second.
    #[error("the other side said nothing for {SILENCE_SECONDS} s")]
    Silent,
}

/// Waits for the next message.
///
/// # Errors
/// [`MessageError`]; the connection cannot go on after one.
pub async fn read<T: DeserializeOwned>(read: &mut (impl AsyncRead + Unpin)) -> Result<T, MessageError> {
    let message = async {
        let mut prefix = [0; 4];
        read.read_exact(&mut prefix).await?;
        let mut body = vec![0; control_len(prefix)?];
        read.read_exact(&mut body).await?;
        Ok(decode_control(&body)?)
    };
    tokio::time::timeout(Duration::from_secs(SILENCE_SECONDS), message).await.unwrap_or(Err(MessageError::Silent))
}

/// Sends a message.
///
/// # Errors
/// [`MessageError`]; also when the other side takes nothing for as long as it may be silent.
pub async fn write<T: Serialize>(write: &mut (impl AsyncWrite + Unpin), message: &T) -> Result<(), MessageError> {
    let bytes = encode_control(message)?;
    let sent = async {
        write.write_all(&bytes).await?;
        write.flush().await
    };
    match tokio::time::timeout(Duration::from_secs(SILENCE_SECONDS), sent).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(MessageError::Silent),
    }
}
