//! Network Block Device: the server that hypervisors talk to (agent, mounted points) and a small client.
//!
//! Fixed newstyle negotiation, structured replies, `base:allocation`. After the protocol document of the NBD project
//! (doc/proto.md), whose integers are big-endian.
#![allow(clippy::big_endian_bytes, reason = "NBD is big-endian")]

pub mod client;
mod patience;
pub mod protocol;
pub mod server;

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::model::Address;

/// A listening socket of either kind.
pub enum Listener {
    /// On a path.
    Unix(UnixListener),
    /// On an address.
    Tcp(TcpListener),
}

/// A connection of either kind.
pub enum Stream {
    /// Over a path.
    Unix(UnixStream),
    /// Over TCP, without Nagle's delay.
    Tcp(TcpStream),
}

impl Listener {
    /// Listens. A socket file that nobody listens on any more is replaced; one in use is not.
    ///
    /// # Errors
    /// Names the address and what occupies it.
    pub async fn bind(address: &Address) -> io::Result<Self> {
        let named = |e: io::Error| {
            let hint = if e.kind() == io::ErrorKind::AddrInUse {
                "; another program listens there: stop it or configure another address"
            } else {
                ""
            };
            io::Error::new(e.kind(), format!("cannot listen on {address}: {e}{hint}"))
        };
        match address {
            Address::Unix(path) => {
                remove_stale(path).await.map_err(named)?;
                if let Some(dir) = path.parent().filter(|d| !d.as_os_str().is_empty()) {
                    std::fs::create_dir_all(dir).map_err(named)?;
                }
                let listener = UnixListener::bind(path).map_err(named)?;
                // Only the owner may connect: whoever can connect can write the disk.
                std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).map_err(named)?;
                Ok(Listener::Unix(listener))
            }
            Address::Tcp(socket) => Ok(Listener::Tcp(TcpListener::bind(socket).await.map_err(named)?)),
        }
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    /// Those of accept; the listener stays usable.
    pub async fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Unix(listener) => Ok(Stream::Unix(listener.accept().await?.0)),
            Listener::Tcp(listener) => {
                let stream = listener.accept().await?.0;
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
        }
    }
}

async fn remove_stale(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => {
            if UnixStream::connect(path).await.is_ok() {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            std::fs::remove_file(path)
        }
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "the path exists and is not a socket")),
        Err(_) => Ok(()),
    }
}

impl Stream {
    /// Connects.
    ///
    /// # Errors
    /// Names the address.
    pub async fn connect(address: &Address) -> io::Result<Self> {
        let named = |e: io::Error| io::Error::new(e.kind(), format!("cannot connect to {address}: {e}"));
        match address {
            Address::Unix(path) => Ok(Stream::Unix(UnixStream::connect(path).await.map_err(named)?)),
            Address::Tcp(socket) => {
                let stream = TcpStream::connect(socket).await.map_err(named)?;
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
        }
    }
}

macro_rules! forward {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            Stream::Unix($stream) => $call,
            Stream::Tcp($stream) => $call,
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        forward!(self, s => Pin::new(s).poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        forward!(self, s => Pin::new(s).poll_write(cx, buf))
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(self, s => Pin::new(s).poll_flush(cx))
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(self, s => Pin::new(s).poll_shutdown(cx))
    }
}
