/* The version that programs show and say in handshakes. */
#ifndef EEP_COMMON_VERSION_H
#define EEP_COMMON_VERSION_H

#define EEP_SOFTWARE "0.1.0"

#endif
